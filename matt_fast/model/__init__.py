"""A pretrained model: loaded, looked into while it runs, given other rows."""
