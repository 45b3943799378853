"""Checkpoints that survive a kill at any moment: JSON and safetensors, never a pickle.

A checkpoint is a folder `step-<8 digits>/` of `model.safetensors`, `optimizer.safetensors`, `optimizer.json`,
`state.json`, `random-<rank>.safetensors` and `manifest.json`, which lists the size and the hash of every other file.

1. `snapshot.take_snapshot` copies everything into CPU memory, on the training thread.
2. `write.write` fills a temporary folder, syncs it, adds the manifest last, renames the folder and points `LATEST` to
   it; only then do older ones go. `background.Writer` does that beside the training.
3. `find.recover` clears up after a killed run, and `find.find_newest` takes the newest folder whose files agree with
   its manifest; names and pointers decide nothing.
4. `restore.restore` puts model, optimizer and random states back, bit for bit.

One process writes for all. What the others know (their random states) is gathered before the snapshot.
"""
