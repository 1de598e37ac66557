"""Tables that say which array lies on which axis of the device mesh; `config.mesh.rules` names one."""
