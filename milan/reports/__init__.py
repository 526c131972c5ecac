"""Reports: runs beside each other, with their curves, evaluations, pictures, stores and cost."""
