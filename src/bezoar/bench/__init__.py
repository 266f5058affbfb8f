"""Attacks times purifiers times seeds times data budgets, measured under equal means."""
