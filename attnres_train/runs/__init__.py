"""What a run is: where it stands on disk, among its stages, whose data it has, how it starts."""
