"""What others do, written again to be measured beside us."""
