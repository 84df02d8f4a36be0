"Files and weights of other projects, read and written."
