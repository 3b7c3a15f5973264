"""What each host says of its model, sampler, rows and options. One file a host."""
