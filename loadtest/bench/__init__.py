"""The harness behind `durable-cluster bench`."""
