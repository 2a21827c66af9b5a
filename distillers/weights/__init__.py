"""A weights folder is all that training and serving share.

A folder is a diffusers pipeline (safetensors only) plus `fewstep.json`, which says what the pipeline cannot: the task,
the published step counts and their times, the labels' names, how the picture is laid out, and a sha256 of each part. A
folder without `fewstep.json` is any diffusers pipeline and opens as a teacher. A student that is an adapter is saved
twice: added to its teacher's weights, which is what opens and is served, and alone, for those who have the teacher. Of
text to image, whose stock pipelines load adapters, it is saved alone: the folder opens on its base, and no other.
Students that answer for a share of the labels or prompts each lie in students/0, students/1, ..., each a network
folder. A folder of the task "autoencoder" holds a vae/ alone: it reconstructs pictures and draws none, so
`read_pipeline` refuses it.
"""
