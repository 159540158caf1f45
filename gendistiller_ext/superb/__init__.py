"""What a student is worth: SUPERB's tasks, a file each, and the paper's inference time."""
