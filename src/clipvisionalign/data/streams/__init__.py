"""Data sets that need not be in memory: WebDataset shards, Parquet files, folders of Hugging Face's `save_to_disk`.

A sample is one image with its captions. In a shard its members have one name before their endings; Parquet files and
saved data sets have a column of images and one of captions.
"""
