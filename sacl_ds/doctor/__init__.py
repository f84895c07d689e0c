"""`python -m sacl_ds.doctor`: whether this node, or all nodes of a hostfile, are fit to train together.

facts       what one node is and has
hosts       hostfile and .deepspeed_env, as DeepSpeed's launcher reads them
reaching    the nodes over ssh, and DeepSpeed's launcher on them
bandwidth   a small all-reduce over all ranks
comparison  what is wrong, judged from all of these; pure
page        the table, and what to do
"""
