"""Ray clusters: extraction's blocks, pretraining's ranks. Only this package imports ray."""
