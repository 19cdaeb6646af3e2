"""What stands beside a sweep: fetch a checkpoint, captions from COCO, prune, doctor."""
