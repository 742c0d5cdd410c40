"""Images, folders, views and the embedded data set."""
