"""Files and folders: JSON with checksums, manifests, output folders, the Hugging Face hub."""
