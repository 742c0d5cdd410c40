"""The MergeVQ tokenizer."""
