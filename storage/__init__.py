"""Local paths and URIs alike: what a location is, and folders of objects on any file system. Imports no other room."""
