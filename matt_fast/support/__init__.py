"""What everything else stands on: checks of arguments, files that survive, memory."""
