"""Speed and memory, as ratios against references written here from the equations and run in the same process."""
