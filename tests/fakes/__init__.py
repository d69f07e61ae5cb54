"""Packages that can't be installed for tests, rebuilt as far as Baton touches them. Never part of the product."""
