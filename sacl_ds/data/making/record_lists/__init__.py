"""Lists of samples to be written as shards, one module for each kind of source.

Each function gives something that can be iterated as often as needed, in the same order, a record at a time.
"""

from sacl_ds.data.making.record_lists.annotations import coco_records, karpathy_records
from sacl_ds.data.making.record_lists.folders import folder_records
from sacl_ds.data.making.record_lists.generated import scene_records
from sacl_ds.data.making.record_lists.tables import table_records

__all__ = ["coco_records", "folder_records", "karpathy_records", "scene_records", "table_records"]
