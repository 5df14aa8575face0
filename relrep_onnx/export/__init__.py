"""Deployment forms: one file each."""
