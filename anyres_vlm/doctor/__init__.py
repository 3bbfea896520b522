"""What has to be right before a run starts: each check looks at or tries the real thing and says what to do."""
