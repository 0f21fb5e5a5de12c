"""The tool `search`: a local index or an HTTP retriever."""
