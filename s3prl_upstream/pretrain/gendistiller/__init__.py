"""`run_pretrain.py -u gendistiller`."""
