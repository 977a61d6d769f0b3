"""What *Average, trim, breed or cut?* compares: rules of merging that search alike."""
