"""A web service that starts workflows in its own transactions: ``flows`` is what runs, ``service`` the example to read."""
