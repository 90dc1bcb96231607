"""Purchases that somebody has to approve: ``flows`` is the example to read, ``page`` what approvers see."""
