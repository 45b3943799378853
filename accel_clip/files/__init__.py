"""The one room that deletes, replaces and cuts what is on the disk, and only what is ours.

1. `lock.FolderLock`: one process owns a run folder; the system drops the lock when the process ends, however it ends.
2. `marked.Draft`: a folder is written beside its place under a random name, marked, and moved there when it is whole.
   The mark lists its files. A folder without our mark, or with anything beside what the mark lists, is never removed.
3. `marked.settle`: what a kill left of all that is finished or undone, by the names and marks alone.
4. `whole.write_text`: a file is replaced in one go; `whole.cut` takes back what was appended to one of ours.

Who calls it has looked first whether the place is ours (`marked.foreign_names`) and refuses it before anything starts.
"""
