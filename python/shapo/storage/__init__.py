"""What commands leave on the disk: atomic files and folders, caches, and digests that say what a file was made from."""
