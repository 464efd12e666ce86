"""A fleet that learns together: exchange of what robots certified, proved again on arrival, and signed updates."""
