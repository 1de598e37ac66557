"""What converters read: RLDS, LeRobot, robomimic and LIBERO's hdf5, video files."""
