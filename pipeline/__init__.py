"""The extraction job: images and a teacher become a target cache."""
