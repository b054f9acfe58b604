"""From Hugging Face weights to what this runtime reads. So far: the names of tensors (`names`)."""
