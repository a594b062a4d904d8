module rig

go 1.21
