"""The student: encoder, decoder, masks, and the layouts it is saved in."""
