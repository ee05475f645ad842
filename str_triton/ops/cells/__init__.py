"""The cells of the low-rank recurrent ops, one file each: what a cell is, its loop on the CPU, its public function."""
