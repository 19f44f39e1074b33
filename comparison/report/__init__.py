"""What a comparison comes out as: the table on the terminal, the page, figures, and files to go on with."""
