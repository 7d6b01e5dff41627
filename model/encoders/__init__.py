"""The audio encoders Whisper, CLAP and SSLAM, and where their weights come from."""
