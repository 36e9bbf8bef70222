"""What goes into each layer of a model while it reads a text: importance matrices and Hessians."""
