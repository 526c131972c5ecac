"""What people see of a run: log, trackers, pictures, report."""
