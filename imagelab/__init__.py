"""What any image method needs: files, models, training, attention, evaluation."""
