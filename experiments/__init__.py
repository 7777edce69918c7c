"""One module a paper's table, each with a `TABLE` (see jdiff.reproduce); run by `jdiff reproduce NAME`."""
