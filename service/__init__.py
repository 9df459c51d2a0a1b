"""The application: settings, tables, storage, queue and one noun a file; its faces are the folders."""
