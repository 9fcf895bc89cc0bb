"""A study of the method on a real model: a queue of jobs, one recorded row each, and tables from the rows."""
