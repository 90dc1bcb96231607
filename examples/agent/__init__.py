"""An agent that thinks, calls tools and answers: ``flows`` is the example to read, ``model`` what it calls."""
