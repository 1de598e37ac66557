"""hdf5 files of robomimic and LIBERO."""
