"""Order fulfilment on the Northwind orders: ``flows`` is the example to read, ``northwind`` its data."""
