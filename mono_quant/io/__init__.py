"""Every byte in or out: the disk, the tensors in files, the Hub. The order is `text` < `disk` < `tensors` < `hub`."""
