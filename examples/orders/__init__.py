"""Order fulfilment on the Northwind orders (``northwind``), as a state machine (``flows``) and as a function (``linear``)."""
