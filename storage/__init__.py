"""Locations (local paths and URIs), and folders of objects on any file system. Imports no other room."""
