"""What may come in: all validation of arguments, before anything is allocated."""
