"""What runs on the robot: ONNX Runtime sessions, compiled routing, files. Never imports the certifier."""
